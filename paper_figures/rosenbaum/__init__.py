"""R. Rosenbaum, *On the relationship between predictive coding and backpropagation*, PLOS ONE
17(3) e0266102 (2022): its figures and run times.
"""
