"""L. Annabi, *Structured memory retrieval*: a recurrent network that finds what it stored."""
