"""Does it fit? The peak is predicted before a weight is read, settings that fit are chosen, and the pair is remembered."""
