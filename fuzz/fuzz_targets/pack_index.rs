#![no_main]

farshore_fuzz::target!(vault::fuzz::pack_index);
