"""What one micro-batch and one update do, on real tensors and on meta tensors alike."""
