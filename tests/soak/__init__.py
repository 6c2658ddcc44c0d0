"""`make soak`: the same work again and again, and a judgement whether anything grows."""
