//! tidepool-init
