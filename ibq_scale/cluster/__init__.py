"""Jobs on a cluster: what is submitted, checked before, followed, and stopped."""
