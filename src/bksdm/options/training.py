"""What verbs that train have in common."""

from bksdm.options.distill import DecoderOptions, DistillOptions, LcmOptions
from bksdm.options.personalize import PersonalizeOptions

StudentOptions = DistillOptions | LcmOptions
TrainingOptions = StudentOptions | DecoderOptions | PersonalizeOptions
