"""Tables, pages and pictures that show records."""
