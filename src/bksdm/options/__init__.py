"""The options of the verbs: one flat dataclass each, which the command line or a caller fills.

Only a verb's own function reads them; what it calls takes plain arguments. A room is free of imports that take long,
and each verb's options are imported without those of others.
"""
