"""What compiled machine code tells without running it (levels L2 and L4): resources, instruction mix, cycle bounds."""
