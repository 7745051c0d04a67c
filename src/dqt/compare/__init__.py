"""`dqt compare`: arms × learning rates × seeds on the same data in the same order, and what they came to."""
