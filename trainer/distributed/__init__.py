"""Workers: ranks, collectives, exchange of sparse gradients."""
