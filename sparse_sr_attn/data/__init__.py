"""Image files, training pairs, resampling, and image metrics."""
