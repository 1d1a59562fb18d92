"""The opponents: what layer-local training is compared with."""
