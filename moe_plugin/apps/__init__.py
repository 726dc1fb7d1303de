"""The commands, and what they are made of; the plugin imports nothing from here."""
