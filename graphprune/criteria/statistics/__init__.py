"""What data shows of channels and weights: statistics of activations, inputs, gradients and curvature, streamed batch by batch.

Every function takes a `graphprune.data.sources.Source`, leaves the model as it was, and, under `torch.distributed`, returns the same on all
processes: the statistics of all their batches.
"""
