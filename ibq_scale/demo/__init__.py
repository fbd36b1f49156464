"""The whole path on one small machine: real photographs, a real S3 endpoint, two ranks, one report."""
