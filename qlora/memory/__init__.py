"""Does it fit? The peak is predicted before a weight is read, and settings that fit are chosen."""
