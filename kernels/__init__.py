"""The fast operations: public functions, their plain definitions, CPU and Triton implementations."""
