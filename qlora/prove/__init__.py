"""What only a real device can show: each promise of this program tried on this machine, with its tolerance."""
