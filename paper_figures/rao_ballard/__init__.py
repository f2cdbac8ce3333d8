"""R. Rao and D. Ballard, *Predictive coding in the visual cortex*, Nature Neuroscience 2, 79-87
(1999): its hierarchy, and fields on natural images.
"""
