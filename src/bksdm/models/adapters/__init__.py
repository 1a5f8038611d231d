"""What others made for a model, and its way to students: LoRAs in any layout, words, ControlNets and their kin."""
