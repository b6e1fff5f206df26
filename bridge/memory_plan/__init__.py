"""What each rank of a training run would hold, and whether it fits."""
