//! tidepool-sandbox
