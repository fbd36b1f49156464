"""Jobs on a cluster: checks before submission, submission, state, cancellation."""
