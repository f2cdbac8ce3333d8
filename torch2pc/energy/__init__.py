"""The energy that the relaxations descend."""
