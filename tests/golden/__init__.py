"""What the scripts write, stored or compared between commits. Only their command lines are used: what is
inside the package may change.
"""
