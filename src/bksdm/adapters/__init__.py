"""What others made for a teacher: LoRAs in any layout, words, ControlNets and their kin, read, merged and carried over."""
