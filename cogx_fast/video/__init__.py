"""Videos as files, and how good they are."""
