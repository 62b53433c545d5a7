"""Command-line programs, one a file, thin over library/ and networks/."""
