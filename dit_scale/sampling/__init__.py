"""Images from a model in memory: settings, labels, denoising, image files."""
