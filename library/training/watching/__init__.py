"""What a run shows of itself while it goes on and afterwards, and what raises the alarm."""
