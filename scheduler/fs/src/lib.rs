//! tidepool-fs
