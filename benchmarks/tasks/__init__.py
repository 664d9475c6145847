"""What is learnt: data and their augmentation, networks, saved weights, attacks."""
