"""The trained weights that come with the library, and what they are compared with."""
