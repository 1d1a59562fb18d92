"""Pictures of analyses: each function gives a PNG of 1200 pixels' width, as bytes."""
