//! tidepool-scheduler
