//! Messages between store nodes and their clients.
