"""What is printed: for people, as JSON, and the progress bar."""
