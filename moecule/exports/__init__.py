"""What other engines read, made of a compressed folder: one file a format."""
