"""What any run needs: optimizers, schedules, run state, saving, trackers, metadata."""
