#![no_main]

farshore_fuzz::target!(vault::fuzz::table_page);
