"""What a model will see of the data: counts by source, a page for people, a report for programs. No Megatron."""
