"""Image files and pairs of them, resampling, and image metrics."""
