"""Operations on plain tensors that training spends its time in.

`reference` is the specification: every faster kernel must give the same integers, bit for bit.
"""
