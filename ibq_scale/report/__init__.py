"""Reports: HTML files with their data, script and pictures inside, readable without a network."""
