"""A stand-in for Ascend's MindSpeed that has its habits, and none of its operators. For tests only."""
