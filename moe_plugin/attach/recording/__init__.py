"""What routers decide in forwards that a user asks about: scores, and which experts each token chose."""
