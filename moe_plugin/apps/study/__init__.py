"""Studies: named arms times seeds, trained one after another and compared by seed."""
