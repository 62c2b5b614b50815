//! Reading small json files with errors that name them.
