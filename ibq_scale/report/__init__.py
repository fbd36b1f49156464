"""Reports: one HTML file each, with its data, script and pictures inside; it opens without a network."""
