"""What a run keeps: commutative monoids over batches. See `base.Accumulator` to add one."""
