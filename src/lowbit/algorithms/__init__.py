"""Better codes and scales than rounding to nearest gives: pure functions of weights, without modules."""
