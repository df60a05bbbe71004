"""Files that appear whole or not at all: staged and hashed writes, checksums, locks."""
